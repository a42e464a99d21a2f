"""The loop: one round of collect → train → evaluate."""

from accord.loop.round import Round, RoundConfig, quickstart_settings

__all__ = ["Round", "RoundConfig", "quickstart_settings"]
