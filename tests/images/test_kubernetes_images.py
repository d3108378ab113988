# SPDX-License-Identifier: Apache-2.0
import unittest

from kubernetes_images import IMAGES, repositories, wanted

LISTED = """gcr.io/somewhere/unknown:2.6
registry.k8s.io/e2e-test-images/busybox:1.37.0-2
registry.k8s.io/e2e-test-images/agnhost:2.66.1
registry.k8s.io/e2e-test-images/agnhost:2.55
registry.k8s.io/pause:3.10.2
127.0.0.1:5000/e2e/nginx:1.28.0-2

registry.k8s.io/e2e-test-images/without-a-tag
"""


class Wanted(unittest.TestCase):
    def test_every_version_of_an_image_that_can_be_made_is_wanted(self):
        self.assertEqual(wanted(LISTED), [("agnhost", "2.55"), ("agnhost", "2.66.1"), ("busybox", "1.37.0-2"),
                                          ("nginx", "1.28.0-2"), ("pause", "3.10.2")])
        self.assertTrue(all(name in IMAGES for name, _ in wanted(LISTED)))

    def test_registries_become_one_and_the_invalid_one_stays_invalid(self):
        text = repositories("10.99.0.1:5000")
        self.assertIn("promoterE2eRegistry: 10.99.0.1:5000/e2e\n", text)
        self.assertNotIn("invalidRegistry", text)


if __name__ == "__main__":
    unittest.main()
