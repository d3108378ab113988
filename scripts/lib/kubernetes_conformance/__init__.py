# SPDX-License-Identifier: Apache-2.0
"""Kubernetes' conformance suite (e2e.test, the specs marked [Conformance]) in a cluster of scripts/cluster."""
