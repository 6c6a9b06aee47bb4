"""Engine: the calls of users, checked, made into requests to hosts, and answered."""
