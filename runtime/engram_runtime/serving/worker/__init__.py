"""An engine in a process of its own, so that whatever ends that one leaves the server, which starts it anew."""
