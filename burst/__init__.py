
from burst.errors import HostFailure, UserError
from burst.transport import Transport, VirtualWorld, run_virtual

