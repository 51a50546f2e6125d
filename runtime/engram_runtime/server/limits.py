"""How much, how long and how many the server takes of anything that comes from outside."""

MAX_BODY_BYTES = 1 << 20
MAX_HELD_BYTES = 16 << 20  # of all bodies that are read or worked on
LARGE_BODY_BYTES = 64 << 10  # beyond which one waits for others of its size
MAX_HEADER_BYTES = 16 << 10
MAX_HEADERS = 64
MAX_CONNECTIONS = 512
SEND_BUFFER_BYTES = 128 << 10  # that the kernel keeps of what a client hasn't read; its own limit is megabytes
HEADERS_S = 5.0  # from the connection, or a request's first byte, to the end of its headers
BODY_S = 10.0  # from there to the end of the body
STALLED_READER_S = 10.0  # that a client may leave what was sent unread
KEEP_ALIVE_S = 5
DRAIN_S = 8  # for answers under way when the server is told to end, which it does within 10
WORKER_THREADS = 4  # that tokenise and render templates, beside the engines' own and those that wait for grammars
