"""When what ran: a recorder is put around the parts of a sequence that is to be traced, and none around others."""
