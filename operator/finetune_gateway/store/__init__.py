"""The gateway's store: SQLite or PostgreSQL, through SQLAlchemy. Imported only where one is set: it costs memory."""
