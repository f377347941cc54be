"""What this template costs, beside what one would write by hand. A clone can drop this folder."""
