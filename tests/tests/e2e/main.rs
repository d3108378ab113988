// SPDX-License-Identifier: Apache-2.0
//! End-to-end tests: everything goes through the CRI socket and runs in real VMs. They are one program, so that one
//! emulated host and one registry serve them all.

mod artifacts;
mod audit;
mod block;
mod bounds;
mod callers;
mod cdi;
mod checkpoint;
mod cli;
mod clients;
mod clock;
mod cni;
mod containers;
mod crictl;
mod damage;
mod declared;
mod delegate;
mod descriptors;
mod empty_dirs;
mod failures;
mod faults;
mod forks;
mod growth;
mod guest_kernel;
mod hostile;
mod images;
mod kubelet;
mod many;
mod network;
mod pods;
mod resources;
mod restart;
mod security;
mod shares;
mod silent;
mod spares;
mod statistics;
mod streaming;
mod systemd;
mod users;
mod volumes;
mod warmed;
