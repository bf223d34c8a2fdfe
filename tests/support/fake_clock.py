"""A clock that stands still until a test moves it."""


class FakeClock:
    """Usable wherever a `Clock` is expected. `now` is its time in seconds; set it or add to it."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now
