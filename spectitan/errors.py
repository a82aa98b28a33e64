"""The two ways in which a program ends early and on purpose."""


class UserError(ValueError):
    """A mistake that the user can mend: the message is one line with what was given, what is allowed, and the key or file.

    Programs print it without a traceback (`job.traceback = true` shows one) and exit with status 2. Any other exception is
    a defect of ours and keeps its traceback.
    """


class StopRequested(BaseException):
    """SIGTERM or SIGINT arrived outside the training loop, where nothing has to be saved: unwind and exit.

    Derived from BaseException, as KeyboardInterrupt is, so that no `except Exception` on the way swallows it.
    """
