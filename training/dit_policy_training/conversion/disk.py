"""Whether an error comes of a disk that takes no more."""

import errno
import os

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


def no_room(error: BaseException) -> str:
    """The reason, if the error comes of a disk that takes no more, by number or in a library's words; or nothing."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _NO_ROOM:
            return os.strerror(seen.errno)
        if os.strerror(errno.ENOSPC) in str(seen):
            return os.strerror(errno.ENOSPC)
        seen = seen.__cause__ or seen.__context__
    return ""
