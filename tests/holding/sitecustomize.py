"""Python runs this at its start where the folder is on PYTHONPATH: it stops a process at a file it is about to touch.

How: tests/holding_still.py. A kill that a test sends while the process waits here always lands between the same two steps,
however fast the machine is. ``sitecustomize`` is the one way into processes that the command under test starts itself.
"""

import os
import re
import sys
import time


def hold(event, arguments):
    if event not in ("open", "os.mkdir", "os.rename"):
        return
    told = " ".join(map(str, (event, *arguments[:2])))
    if re.search(AT, told) and not os.path.exists(HELD):
        with open(HELD, "w") as stream:
            stream.write(told)
        while not os.path.exists(f"{HELD}.go"):
            time.sleep(0.01)


if os.environ.get("HOLD_AT"):  # else whoever imports this by chance would be held
    AT, HELD = os.environ["HOLD_AT"], os.environ["HOLD_NOTE"]
    sys.addaudithook(hold)
