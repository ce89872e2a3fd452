# SPDX-License-Identifier: Apache-2.0
"""The command line: ``sida inspect``, ``demo``, ``train-predictor`` and ``evaluate``.

One file a command; `app` puts them together. Reports go to stdout, progress and errors to stderr.
Exit codes: 0; 2 if what was asked for cannot be (arguments, files, budgets); 1 if it failed.
"""

from __future__ import annotations


def main() -> None:
    """Run the command line and exit."""
    from sida.cli.app import app

    app()
