# SPDX-License-Identifier: Apache-2.0
"""The benchmarks, run on a KVM host by scripts/bench. See __main__ for what there is, and passes for what is measured."""
