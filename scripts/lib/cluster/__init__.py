# SPDX-License-Identifier: Apache-2.0
"""The parts of scripts/cluster: `authority` makes certificates, `control_plane` runs outside of the nodes, `node` on one."""
