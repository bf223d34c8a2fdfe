"""The HTTP routes of `broadcache replica`: products, and the demo's measurements."""

import time
from decimal import Decimal
from http import HTTPStatus
from typing import Annotated, Any, NamedTuple, cast

import msgspec
from fastapi import FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from ... import __version__
from ...shared.invalidation import Invalidation
from ...shared.process.problems import PROBLEM_MEDIA_TYPE, BasicProblem
from ...subscriber import LocalCache, WhenIncoherent
from .catalogue import Catalogue, NaiveCatalogue, NoSuchProduct, Product, key_of, new_cache

__all__ = ["Drop", "ObservedCache", "naive_app", "replica_app"]

ProductId = Annotated[int, Path(ge=1, le=2**63 - 1)]


class Price(BaseModel):
    """The body of PUT."""

    price: Annotated[Decimal, Field(ge=0, max_digits=9, decimal_places=2, examples=["17.50"])]


class Drop(NamedTuple):
    """The last invalidation that a cache has applied, and when, on the clock that all processes of a machine share."""

    id: str
    sequence: int | None
    applied_at_ns: int


class ObservedCache(LocalCache):
    """A local cache that records when it applied the last invalidation, for the demo's measurement."""

    def __init__(self, when_incoherent: str = "bypass") -> None:
        super().__init__(new_cache(), when_incoherent=cast("WhenIncoherent", when_incoherent))
        self.last_drop: Drop | None = None

    def apply_invalidation(self, invalidation: Invalidation, *, reason: str = "invalidation") -> None:
        """Apply the invalidation, then read the clock."""
        super().apply_invalidation(invalidation, reason=reason)
        if invalidation.id:  # it came from a publisher
            self.last_drop = Drop(invalidation.id, invalidation.seq, time.monotonic_ns())


def replica_app(catalogue: Catalogue, name: str) -> FastAPI:
    """Return the app of a subscribed replica."""
    app = _app(name, lifespan=catalogue.lifespan)
    app.include_router(catalogue.router)
    _add_products(app, catalogue, name)

    @app.get("/demo/last-drop", tags=["demo"], summary="Which invalidation was applied last, and when?")
    async def last_drop() -> dict[str, Any]:
        cache = catalogue.cache
        drop = cache.last_drop if isinstance(cache, ObservedCache) else None
        return (drop or Drop("", None, 0))._asdict()

    return app


def naive_app(catalogue: NaiveCatalogue, name: str) -> FastAPI:
    """Return the app of a replica without a subscription."""
    app = _app(name)
    _add_products(app, catalogue, name)

    @app.get("/health/live", tags=["broadcache"], summary="Does the process answer?")
    async def live() -> dict[str, str]:
        return {"status": "live", "replica": name}

    return app


def _app(name: str, **options: Any) -> FastAPI:
    app = FastAPI(title=f"broadcache replica {name}", version=__version__, **options)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(RequestValidationError, _validation_problem)
    app.add_exception_handler(NoSuchProduct, _missing_problem)
    return app


def _add_products(app: FastAPI, catalogue: Catalogue | NaiveCatalogue, name: str) -> None:
    @app.get("/products/{product_id}", tags=["products"], summary="Read a product through the local cache")
    async def read(product_id: ProductId) -> dict[str, Any]:
        from_cache = key_of(product_id) in catalogue.cache
        return _described(await catalogue.product(product_id), name, from_cache=from_cache)

    @app.put("/products/{product_id}", tags=["products"], summary="Write the source, and invalidate nothing")
    async def write(product_id: ProductId, price: Price) -> dict[str, Any]:
        product = await catalogue.set_price(product_id, price.price)
        return _described(product, name, from_cache=False)


def _described(product: Product, name: str, *, from_cache: bool) -> dict[str, Any]:
    return {
        "id": product.id,
        "name": product.name,
        "price": float(product.price),
        "replica": name,
        "from_cache": from_cache,
    }


async def _http_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _problem(error.status_code, error.detail)


async def _missing_problem(request: Request, error: Exception) -> Response:
    return _problem(404, str(error))


async def _validation_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    wrong = "; ".join(f"{each['msg']} at {'.'.join(map(str, each['loc']))}" for each in error.errors())
    return _problem(422, wrong)


def _problem(status: int, detail: str) -> Response:
    problem = BasicProblem(type="about:blank", title=HTTPStatus(status).phrase, status=status, detail=detail)
    return Response(msgspec.json.encode(problem), status, media_type=PROBLEM_MEDIA_TYPE)
