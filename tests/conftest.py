"""What all tests share."""

from hypothesis import settings

# A loaded machine is no counterexample. (Where CI is set, hypothesis also takes the same examples each time.)
settings.register_profile("migproxy", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("migproxy")
