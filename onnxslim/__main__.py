"""``python -m onnxslim``, and what the command ``onnxslim`` starts."""

from __future__ import annotations

import gc

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    # Modules are many objects that live until the end. Looking through them for garbage, again and again while they are
    # loaded and later with every collection, finds none and costs a fifth of a short command's time.
    gc.disable()
    from onnxslim.cli import main as run

    gc.freeze()
    gc.enable()
    run()


if __name__ == "__main__":
    main()
