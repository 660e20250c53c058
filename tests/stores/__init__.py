"""Stand-ins for object stores: servers on 127.0.0.1 whose faults are set."""
