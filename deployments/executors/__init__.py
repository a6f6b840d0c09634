"""How a resolved request becomes events: pictures, videos, frame-wise videos."""
