"""Help texts with their defaults, where there is one to show."""

from __future__ import annotations

import argparse


class DefaultsShown(argparse.ArgumentDefaultsHelpFormatter):
    """argparse's formatter of that name also prints "(default: None)" and "(default: False)", which tell nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, "") else super()._get_help_string(action)
