"""Tests of guest_kernel_page.py, and of the page that it writes."""
import os
import unittest

import guest_kernel_page


class Pages(unittest.TestCase):
    def test_a_comment_opens_a_group(self):
        text = "# One.\n# More.\nCONFIG_A=y\nCONFIG_B=m\n# Two.\nCONFIG_C=n\nCONFIG_D=\"x\"\n"
        first, second = guest_kernel_page.groups(text)
        self.assertEqual(first.comment, "One. More.")
        self.assertEqual((first.names("y"), first.names("m"), first.names("n")), (["A"], ["B"], []))
        self.assertEqual((second.names("y"), second.names("n")), (['D="x"'], ["C"]))

    def test_the_page_is_up_to_date(self):
        options = os.path.join(guest_kernel_page.PROJECT, "guest-kernel")
        with open(guest_kernel_page.PAGE, encoding="utf-8") as file:
            self.assertEqual(file.read(), guest_kernel_page.page(options), "run scripts/lib/guest_kernel_page.py")


if __name__ == "__main__":
    unittest.main()
