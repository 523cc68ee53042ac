# The model on top of the base image; rebuilt only when one of the two changes.
FROM base:1
LABEL "dev.coldstart.model.digest"="sha256:3f67e8a062fad2f11ffd6e53d1750404508f7e82e60f0016c0265bc64c5bf07f" "dev.coldstart.role"="weights" "dev.coldstart.weights.key"="cb1a5695685d4be7a7acb0e0e9af325da3a64c3809b116364c2ace2729af7ed5"
COPY ["layers/00/", "/models/Tiny-1B/"]
COPY ["layers/01/", "/models/Tiny-1B/"]
