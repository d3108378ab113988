// SPDX-License-Identifier: Apache-2.0
//! Compiles the two protocols with protox, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(["proto/cri.proto", "proto/agent.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .bytes(".bulkhead.agent.v1")
        .compile_fds(descriptors)?;
    Ok(())
}
