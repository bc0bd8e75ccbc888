//! Pod networks: the built-in bridge and its address management, host ports, CNI, pod DNS.
