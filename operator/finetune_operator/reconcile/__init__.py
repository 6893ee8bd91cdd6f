"""PURE: (observed, now) -> Plan, one package for each kind."""
