# SPDX-License-Identifier: Apache-2.0
"""Settings that all tests share."""

import os

from hypothesis import settings

# Continuous integration tries the same examples every time; other runs look for new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
