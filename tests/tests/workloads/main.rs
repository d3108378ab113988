// SPDX-License-Identifier: Apache-2.0
//! The suite of workloads: real programs on real pods, each asserting what its users rely on. Black-box, through the CRI
//! socket. `scripts/workloads` makes the images, runs the tests and writes docs/workloads.md. The title of a test's table
//! is what the page says of it.

mod databases;
mod inside;
mod kernel;
mod languages;
mod network;
mod tools;
mod web;
