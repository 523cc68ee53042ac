"""What runs inside the image as PID 1 and its children. Never imports builder/."""
