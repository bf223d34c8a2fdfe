"""The public names of the publisher: publishing, its second path over HTTP, and audits of the replicas.

`Fanout` and `Auditor` are imported on first use, so that a publisher without them needs no extra.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ..shared.confirmation import Confirm
from ..shared.process.renamed import old_names
from .history.namespaces import ForgetResult, NamespacesPage, NamespaceSummary
from .publishing.delivery import Delivery, InvalidationSender
from .publishing.preview import Preview, ReplicaPreview
from .publishing.publisher import Publisher
from .sync_publisher import SyncPublisher

if TYPE_CHECKING:
    from .audit.auditor import Auditor
    from .audit.stats import AuditStats, Inconsistency
    from .fanout.fanout import Fanout

__all__ = [
    "AuditStats",
    "Auditor",
    "Confirm",
    "Delivery",
    "Fanout",
    "ForgetResult",
    "Inconsistency",
    "InvalidationSender",
    "NamespaceSummary",
    "NamespacesPage",
    "Preview",
    "Publisher",
    "ReplicaPreview",
    "SyncPublisher",
]

_MODULE_OF: Final = {
    "AuditStats": ".audit.stats",
    "Auditor": ".audit.auditor",
    "Fanout": ".fanout.fanout",
    "Inconsistency": ".audit.stats",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    Teller: TypeAlias = InvalidationSender
else:
    _old_name = old_names(__name__, {"Teller": "InvalidationSender"}, globals(), stacklevel=3)

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            return _old_name(name)
        value = globals()[name] = getattr(import_module(_MODULE_OF[name], __name__), name)
        return value
