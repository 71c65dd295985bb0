"""`speeder bench`: the speed of Speeder beside language models that read items as text, in one run."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler logs every start and stop
