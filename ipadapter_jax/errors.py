"""What a person did wrong, said in one line."""


class InputError(ValueError):
    """Bad input: one line that names the offender and the remedy. The command line shows it and exits with 2."""


class PictureError(InputError):
    """A picture came out that is none; others of its batch may be good."""


class WeightFileError(InputError):
    """A weight file that cannot be used: damaged, hostile, of another kind, or made for another model."""
