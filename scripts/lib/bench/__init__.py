# SPDX-License-Identifier: Apache-2.0
"""The benchmarks. scripts/bench runs them on a KVM host. __main__ lists them, passes says what is measured."""
