resource "aws_vpc" "weft" {
  cidr_block           = "10.64.0.0/16"
  enable_dns_support   = true
  enable_dns_hostnames = true # the name of the file system
  tags                 = { Name = var.name }
}

resource "aws_internet_gateway" "weft" {
  vpc_id = aws_vpc.weft.id
}

resource "aws_subnet" "nodes" {
  count                   = length(var.zones)
  vpc_id                  = aws_vpc.weft.id
  cidr_block              = cidrsubnet(aws_vpc.weft.cidr_block, 4, count.index)
  availability_zone       = var.zones[count.index]
  map_public_ip_on_launch = true # nodes install packages; nothing but SSH and HTTPS reaches them
  tags                    = { Name = "${var.name}-${var.zones[count.index]}" }
}

resource "aws_route_table" "weft" {
  vpc_id = aws_vpc.weft.id
  route {
    cidr_block = "0.0.0.0/0"
    gateway_id = aws_internet_gateway.weft.id
  }
}

resource "aws_route_table_association" "nodes" {
  count          = length(var.zones)
  subnet_id      = aws_subnet.nodes[count.index].id
  route_table_id = aws_route_table.weft.id
}

resource "aws_vpc_endpoint" "s3" { # results do not leave the network
  vpc_id            = aws_vpc.weft.id
  service_name      = "com.amazonaws.${var.region}.s3"
  vpc_endpoint_type = "Gateway"
  route_table_ids   = [aws_route_table.weft.id]
}

# Made before `ray up`, so that the file system and the stores can admit it.
resource "aws_security_group" "nodes" {
  name        = "${var.name}-nodes"
  description = "All nodes of Ray: each other, and SSH of the administrators"
  vpc_id      = aws_vpc.weft.id
  ingress {
    description = "Ray trusts its nodes: all ports, this group only"
    from_port   = 0
    to_port     = 0
    protocol    = "-1"
    self        = true
  }
  ingress {
    description = "SSH"
    from_port   = 22
    to_port     = 22
    protocol    = "tcp"
    cidr_blocks = var.admins
  }
  egress {
    from_port   = 0
    to_port     = 0
    protocol    = "-1"
    cidr_blocks = ["0.0.0.0/0"]
  }
}

resource "aws_security_group" "head" {
  name        = "${var.name}-head"
  description = "HTTPS of the callers, and HTTP for certificates"
  vpc_id      = aws_vpc.weft.id
  dynamic "ingress" {
    for_each = [80, 443]
    content {
      from_port   = ingress.value
      to_port     = ingress.value
      protocol    = "tcp"
      cidr_blocks = ingress.value == 443 ? var.callers : ["0.0.0.0/0"] # Let's Encrypt asks from anywhere
    }
  }
}

resource "aws_security_group" "stores" {
  name        = "${var.name}-stores"
  description = "File system and Valkeys, for nodes only"
  vpc_id      = aws_vpc.weft.id
  dynamic "ingress" {
    for_each = [2049, 6379]
    content {
      from_port       = ingress.value
      to_port         = ingress.value
      protocol        = "tcp"
      security_groups = [aws_security_group.nodes.id]
    }
  }
}
