"""Shared by unit tests: the time of one example tells how loaded the machine is, so none has a deadline.

pytest's timeout ends what hangs.
"""

import hypothesis

hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")
