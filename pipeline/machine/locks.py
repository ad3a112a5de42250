"""What tells that a file system has no locks."""

import errno

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
"""Error numbers of `fcntl.flock` on a file system without locks."""
