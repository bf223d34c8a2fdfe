"""A replica in ten lines: `uvicorn examples.catalogue:app`, with BROADCACHE_REDIS_URL set."""

from cachetools import TTLCache
from fastapi import FastAPI

from broadcache.subscriber import CacheInvalidationMixin

PRICES = {1: 100, 2: 250}  # the source: your database


class Catalogue(CacheInvalidationMixin):
    namespace = "products"

    def __init__(self) -> None:
        super().__init__(cache=TTLCache(maxsize=10_000, ttl=300))

    async def price(self, product_id: int) -> int:
        return await self.get_or_load(f"product:{product_id}", lambda: PRICES[product_id], tags=("catalogue",))


catalogue = Catalogue()
app = FastAPI(lifespan=catalogue.lifespan)
app.include_router(catalogue.router)


@app.get("/prices/{product_id}")
async def price(product_id: int) -> int:
    return await catalogue.price(product_id)
