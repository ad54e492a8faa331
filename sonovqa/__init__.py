"""What SonoVQA's scripts share: one flat package of small modules. The scripts import it; it never imports them."""

__version__ = "0.1.0"
