# SPDX-License-Identifier: Apache-2.0
"""Reads the JSON reports of Ginkgo, with which critest and Kubernetes' suite run their specs."""
import json


def name_of(spec):
    return " ".join([*(spec["ContainerHierarchyTexts"] or []), spec["LeafNodeText"]])


def specs_of(path):
    """Reads a report. Returns it and its specs."""
    with open(path) as file:
        report = json.load(file)[0]
    return report, [spec for spec in report["SpecReports"] or [] if spec["LeafNodeType"] == "It"]
