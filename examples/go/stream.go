// Asks about an image and prints the answer as it comes.
//
// Usage: stream HOST:PORT IMAGE QUESTION
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	pb "trimserve/v1"
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: stream HOST:PORT IMAGE QUESTION")
		os.Exit(2)
	}
	if err := ask(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		if refused, ok := status.FromError(err); ok {
			fmt.Fprintf(os.Stderr, "%v: %s\n", refused.Code(), refused.Message())
		} else {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(1)
	}
}

// ask prints the answer, and what it kept of the image.
func ask(address, image, question string) error {
	data, err := os.ReadFile(image)
	if err != nil {
		return err
	}
	connection, err := grpc.Dial(address, grpc.WithInsecure())
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	stream, err := pb.NewGenerationServiceClient(connection).GenerateStream(ctx, request(data, question))
	if err != nil {
		return err
	}
	for {
		response, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		switch event := response.Event.(type) {
		case *pb.GenerateStreamResponse_Delta:
			fmt.Print(event.Delta.Text)
		case *pb.GenerateStreamResponse_Finished:
			usage := event.Finished.Usage.Images[0]
			fmt.Printf("\nkept %d of %d visual features, %d merged rows\n",
				usage.KeptFeatures, usage.ValidFeatures, usage.MergedFeatures)
		}
	}
}

// request shows the image, then asks.
func request(image []byte, question string) *pb.GenerateRequest {
	message := &pb.Message{Role: pb.Role_ROLE_USER, Parts: []*pb.Part{
		{Content: &pb.Part_Image{Image: &pb.Image{Source: &pb.Image_Data{Data: image}}}},
		{Content: &pb.Part_Text{Text: question}},
	}}
	return &pb.GenerateRequest{Prompt: &pb.GenerateRequest_Chat{Chat: &pb.Chat{Messages: []*pb.Message{message}}}}
}
