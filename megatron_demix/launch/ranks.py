"""torchrun with two manners it lacks: it ends with its ranks' exit code, and it dies when whoever started it dies.

`python -m megatron_demix.launch.ranks [torchrun's own arguments] -m MODULE ARGS`
"""

from __future__ import annotations

import logging
import sys

from megatron_demix.errors import Incomplete
from megatron_demix.process import die_with_parent


def main() -> int:
    die_with_parent()
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as e:
        _, first = e.get_first_failure()
        return first.exitcode if first.exitcode >= 0 else 128 - first.exitcode
    except SignalException:
        return Incomplete.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
