"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
  """A mistake that the user can mend: names the field or file, the value, the cure."""
