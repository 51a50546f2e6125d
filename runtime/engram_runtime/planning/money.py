"""What tokens cost."""

from dataclasses import dataclass

from engram_runtime.errors import RequestError

MILLION, HOUR_S = 1_000_000, 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """In any currency: ``watts`` of the machine at ``electricity`` a kWh, and ``hour`` for what it costs besides."""

    watts: float | None = None
    electricity: float | None = None
    hour: float | None = None

    def __post_init__(self) -> None:
        """Raise RequestError where power has no price or a price no power."""
        if (self.watts is None) != (self.electricity is None):
            raise RequestError("--watts and --electricity say what power costs together; give both or neither")

    @property
    def known(self) -> bool:
        """Whether there is anything to pay."""
        return self.watts is not None or self.hour is not None

    @property
    def per_hour(self) -> float:
        """The price of an hour."""
        power = 0.0 if self.watts is None or self.electricity is None else self.watts / 1000 * self.electricity
        return power + (self.hour or 0.0)

    def per_million(self, tokens_per_s: float) -> float:
        """Return the price of a million tokens at a rate."""
        return self.per_hour * MILLION / tokens_per_s / HOUR_S


NO_PRICES = Prices()
