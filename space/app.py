"""The playground as a Hugging Face Space. The variable CROSSTRIM_MODEL names another model than the embedded one."""

import functools
import os

from crosstrim.asking.environment import best_device
from crosstrim.play import serving

if __name__ == "__main__":
    serving.serve(
        os.environ.get("CROSSTRIM_MODEL", "mini"),
        host="0.0.0.0",  # a Space is reached through a proxy, at this port
        port=7860,
        ready=functools.partial(print, flush=True),
        device=best_device(),
    )
