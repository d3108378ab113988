# SPDX-License-Identifier: Apache-2.0
"""The suite of workloads (tests/tests/workloads): runs it on a KVM host, keeps what was seen, and writes a page of it."""
