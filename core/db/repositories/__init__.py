"""Every query of the project, one repository per noun.

A repository takes a session and, where rows are owned, the principal: another project's row is as
good as missing. `get` raises, `find` returns `None`. Nothing here commits; callers own the session.
"""
