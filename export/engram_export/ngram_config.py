"""The sizes of an n-gram site on several residual streams."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramSiteConfig:
    """A site before layer ``layer`` that reads ``columns`` rows of ``row_dim`` a token."""

    layer: int
    columns: int
    row_dim: int
    conv_kernel: int
    conv_dilation: int

    @property
    def site(self) -> str:
        """The site's name in the bundle."""
        return f"layer_{self.layer}"

    @property
    def window(self) -> int:
        """Earlier steps the convolution looks at."""
        return (self.conv_kernel - 1) * self.conv_dilation
