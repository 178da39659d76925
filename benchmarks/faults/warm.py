"""What whole commands import besides: loaded once by the server that children are forked from, or ten seconds each."""

import flows.plain
import flows.reporting.report
import flows.running
import flows.tracking  # noqa: F401
