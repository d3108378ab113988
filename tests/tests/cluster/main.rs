// SPDX-License-Identifier: Apache-2.0
//! Tests in a cluster that `scripts/cluster` brought up: what users do with kubectl. All run beside each other, but
//! those of `alone` and `delegate`, which change what the node has for others.

mod alone;
mod delegate;
mod page;
mod scheduling;
mod services;
mod tools;
mod volumes;
mod workloads;
