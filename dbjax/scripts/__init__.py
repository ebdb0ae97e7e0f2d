"""Files that dbjax.export copies into a folder. They run there without dbjax; nothing imports them.
"""
