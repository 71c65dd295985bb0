"""`speeder bench`: the speed of Speeder beside language models that read items as text, in one run."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler tells of every start and stop otherwise
