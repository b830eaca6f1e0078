"""Shared by unit tests: property tests try the same examples everywhere, and none has a deadline.

The time of an example tells how loaded the machine is; pytest's timeout ends what hangs. To explore further:
``HYPOTHESIS_PROFILE=explore pytest ...``.
"""

import os

import hypothesis

hypothesis.settings.register_profile("any machine", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "any machine"))
