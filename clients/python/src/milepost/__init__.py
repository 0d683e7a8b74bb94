"""The client of milepost: append events to jobs, and watch them live.

`connect` makes a channel for `watch`, `Publisher` and the stubs that are generated in
`milepost.v1`. `milepost.aio` has the same for asyncio.
"""

from milepost._channel import connect
from milepost._errors import MilepostError
from milepost._outbox import Job, ProviderJobId
from milepost._publisher import Publisher
from milepost._spool import Spool, SpoolFull, SpoolLocked
from milepost._watch import watch

__all__ = ["Job", "MilepostError", "ProviderJobId", "Publisher", "Spool", "SpoolFull", "SpoolLocked"]
__all__ += ["connect", "watch"]
